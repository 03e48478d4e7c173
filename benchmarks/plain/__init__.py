"""Training loops as one writes them from a paper with torch, diffusers and peft alone: what ours are compared with.

Each is a generator that yields a step's loss. It does what our engine does in the same order: `without` names the
rearrangements that a run does without, as a first draft of it would. Nothing here imports fieldsmith.
"""
