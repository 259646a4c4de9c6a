"""Images that a trained network finds similar: figure 4 (right) and section 6.1 of the paper.

features  fc7 features of every image of a split, on disk
extract   workers that compute them, each image passed through the network once
search    nearest neighbors: exact, and of codes by Hamming distance
coders    coders of features to 64..256 bits: PCA, ITQ, an auto-encoder
codes     command: short codes beside the exact search and product quantisation
figures   pairs of one class against pairs of two, the contact sheet, the histogram
summary   summary.json, the results of both commands
"""
