"""One self-contained HTML page about a run, and contact sheets of images; the last stop of every verb.

In: numbers, sentences, images in [0, 1] and curves, from metrics.json, metrics.jsonl and the samplers.
Out: report.html, which opens offline anywhere (no script, no outside file), and PNG grids.
"""
