"""Colours and marks of every plot: told apart by people who see few colours, and the marks by those who see none."""

# Okabe and Ito, "Color Universal Design" (jfly.uni-koeln.de/color; also Wong 2011, Nature Methods 8, 441), without its
# yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
