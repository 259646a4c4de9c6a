"""The report: one page about a run, or about several, made from the files in RUN.

records   rows of metrics, validation, layers and evaluations, whatever is missing or damaged
settings  settings beside those of the preset, and of other runs
curves    charts of loss, errors, rates, speed, waiting for data, memory, updates
tables    the verdict, and the numbers in tiles, bars and tables
images    training images as the network gets them; figure 4 (left): its five best answers
feature_maps  maps of chosen layers, of images with their answers
kernels   figure 3: the kernels of conv1, their scores, and both over time
comparison  several runs side by side (comparison.html.j2)
page      command, and RUN/report.html (page.html.j2, parts.html.j2, style.css)
"""
