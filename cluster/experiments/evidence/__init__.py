"""The paper's claims beside what was found here, on one page.

claims        what the paper says, with its numbers and sections
runs          runs in groups of seeds, results of other commands, rows of the page
significance  spread over seeds, and how large a difference chance explains
items         items that are numbers: errors, views, settings, speed, the competition
studies       items on studies and ensembles
figures       items that show images: kernels, answers, neighbors, short codes
"""
