"""The report of a run: one page, made from the files in RUN.

records     what a run wrote down, read back, whatever is missing or half there
charts      line charts as SVG paths
curves      loss, error, pictures a second, waiting for data
tables      the numbers in tiles, bars and tables
pictures    what the network sees, and what its first layer looks for
page        all of it joined into RUN/report.html (page.html.j2)
"""
