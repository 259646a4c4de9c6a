"""Commands that put the paper's claims to the test.

ensemble   averages of networks: table 2
evidence   the paper's claims beside what was found here, on one page
neighbors  images that a network finds similar, and short codes: figure 4 (right), section 6.1
study      variants of a training, several seeds, one number each
"""
