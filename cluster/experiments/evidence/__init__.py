"""What the paper claims beside what was found here, on one page.

    python -m cluster.experiments.evidence RUN...

claims    what the paper says, with its numbers and sections
gather    the runs and results in the folders named, runs sorted into groups of seeds
numbers   mean and spread over seeds, and what a difference is worth
discord   the same for one network's two answers to the same images
item      an entry of the page: claim, rows of comparisons, scale
results   items that are numbers: errors, views, what a setting is worth, speed
figures   items that are images: kernels, answers
alike     neighbours and short codes
studies   items from other commands' results: ensembles, studies
page      all of it joined into one page (evidence.html.j2, with the report's parts and style)
"""
