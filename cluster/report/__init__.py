"""The report of a run: one page, made from the files in RUN.

records      what a run wrote down, read back, whatever is missing or half there
charts       line charts as SVG paths
curves       loss, error, images a second, waiting for data
tables       the numbers in tiles, bars and tables
images     what the network sees, and kernels side by side
scores       how colourful and how oriented a kernel is; how far the columns are apart in it
first_layer  figure 3 of the paper: the kernels with their scores, and over time
answers      figure 4 (left) of the paper: images with the five most probable classes
page         all of it joined into RUN/report.html (page.html.j2, parts.html.j2, style.css)
"""
