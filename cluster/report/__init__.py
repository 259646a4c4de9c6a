"""The report of a run: one page, made from the files in RUN.

records   rows of metrics, validation, layers and evaluations, whatever is missing or damaged
curves    charts of loss, error, images per second, waiting for data, updates
tables    the numbers in tiles, bars and tables
images    training images as the network gets them; figure 4 (left): its five best answers
kernels   figure 3: the kernels of conv1, their scores, and both over time
page      command, and RUN/report.html (page.html.j2, parts.html.j2, style.css)
"""
