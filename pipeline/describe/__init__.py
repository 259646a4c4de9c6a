"""What a data set holds, as a table and as one page to look at: `python -m pipeline.describe DATA`.

    facts       manifest, index, statistics, rejects and duplicates -> numbers
    charts      numbers -> SVG paths
    images    samples -> small images inside the page
    table       the numbers for a terminal, and as one JSON object
    page        all of it on one page, and the command

(Inside the package there is no clash with the standard library's `inspect`: imports are absolute.)
"""
