"""Images that a trained network takes for alike: figure 4 (right) and section 6.1 of the paper.

trained      a run, its checkpoint and a data set that go together
features     fc7 of every image of a split, sealed in a file
growing      the same file while it is being written, block by block
extract      workers that fill it, each image passed through the network once
search       exact nearest neighbours by blocks, in bounded memory
distances    pairs of the same class against pairs of different ones
sheet        an image of queries and their neighbours
plot         a histogram as SVG
autoencoder  4096 numbers to 64..256 bits
hamming      search among bits
rivals       codes that need no training, and product quantisation
trial        the same queries by all of these
summary      RUN/neighbours/summary.json
command      python -m cluster.experiments.neighbors
codes        python -m cluster.experiments.neighbors.codes
"""
