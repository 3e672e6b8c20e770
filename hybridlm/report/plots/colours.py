"""Colours and markers of all plots: the colours stay distinct with colour blindness, the markers without any colour."""

# Okabe and Ito, "Color Universal Design" (jfly.uni-koeln.de/color; also Wong 2011, Nature Methods 8, 441), without the
# yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
