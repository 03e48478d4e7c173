"""Small pretrained pipelines: `zoo:NAME` is the folder NAME here, weights in safetensors with card.json and README.md.

The recipes that made them are in experiments/zoo, which is not installed.
"""
