"""What a data set holds, as a table and as one page.

__main__  command, and the page (page.html.j2)
facts     manifest, index, statistics, rejects and duplicates as numbers: table and JSON
figures   sample images and charts of the page
"""
