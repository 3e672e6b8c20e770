"""How weights move: one optimizer over groups of parameters, each with its algorithm. torch alone, so that a plan can
run it, too."""
