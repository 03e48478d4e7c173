"""Small pretrained pipelines, each with the recipe that made it: `zoo:NAME` is the folder NAME here.

In: a recipe's settings. Out: a diffusers pipeline in safetensors with card.json and README.md.
"""
