"""Report of a data set: a table and one page.

__main__  command, and the page (page.html.j2)
facts     manifest, index, statistics, rejects and duplicates as numbers: table and JSON
card      README.md and croissant.json
figures   sample images and charts of the page
"""
