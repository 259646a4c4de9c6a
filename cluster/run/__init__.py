"""Files that a run leaves in RUN.

folder         layout of RUN and its locks
jsonl          durable JSON-lines files, and all their readers
events         events that workers send to the driver
metrics        times steps; rows of steps and validations
kernels        snapshots of conv1
probabilities  class probabilities of every image
exporters      Prometheus
trackers       TensorBoard, Weights & Biases, MLflow
console        terminal output
state          state of a run, from its files
sync           copy of the files in a store
"""
