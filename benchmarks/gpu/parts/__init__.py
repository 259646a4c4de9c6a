"""The parts of `benchmarks/gpu/stream.py` and, the last two, of `step.py`.

options   what may be chosen, and the steps
lanes     what is measured: ways from stored images to batches
copies    copies of a data set: larger, raw, damaged
clock     batches -> images a second, and the time there is for it
search    the best setting, one axis after the other
pixels    are they those of the CPU, and the same every time?
damage    what an image that cannot be decoded does (a process of its own)
record    the results: sealed after each measurement
table     the results as Markdown
machine   what all this runs on
step_table  a training step's results, and the goals
"""
