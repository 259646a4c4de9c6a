"""The parts of the benchmarks in this folder.

record    the results: sealed after each measurement
machine   what all this runs on

Of `step.py` and `loop.py`:
step_table    a training step's results, and the goals
step_profile  what a GPU does in some steps, launches and busy time
loop_table    the training loop's results, and the goals

Of `stream.py`:
options   what may be chosen, and the steps
lanes     what is measured: ways from stored images to batches
copies    copies of a data set: larger, raw, damaged
clock     batches -> images a second, and the time there is for it
search    the best setting, one axis after the other
pixels    are they those of the CPU, and the same every time?
damage    what an image that cannot be decoded does (a process of its own)
table     the results as Markdown
"""
