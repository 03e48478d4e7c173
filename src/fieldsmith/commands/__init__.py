"""The verbs as the command line runs them: arguments -> config -> method -> artefacts and a page.

In: the words after the verb. Out: a run directory (design, section 4). Each command imports what it needs, late.
"""
