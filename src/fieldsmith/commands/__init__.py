"""The verbs as the command line runs them: arguments -> config -> method -> artefacts and a page.

In: the words after the verb. Out: a run directory (design, section 4). Each command imports what it needs, late.
"""

VERBS = {
    "align": "Raise a reward without losing the rest (reward score matching, every method that it unifies).",
    "edit": "Train an editor on its own multi-turn sessions (MT-EditFlow by NFT or GRPO, its controls, and ours).",
    "erase": "Make a forbidden prompt give what an anchor prompt gives (GEM and six baselines).",
    "distill": "Train a smaller student that keeps both branches of guidance (DASH, its rivals, and ours).",
    "sharpen": "Make fewer samples that lie where the data has none (VSM, five rivals, and ours), and count them.",
    "measure": "Measure a finished run again, with other judges, or complete what a judge that failed left out.",
    "plan": "What a run of one of these would take: parameters, memory by part, forwards, judgements, disk.",
    "diagnose": "Say what is undetermined in a model, and what to run next; nothing is trained.",
    "export": "Write an adapter under the keys that kohya's scripts, ComfyUI or diffusers read.",
    "push": "Upload a finished run to the hub, with a model card.",
    "families": "Print which verb trains which family of pipelines, by LoRA or as a whole.",
    "sample": "Draw a grid of images from a model.",
    "completion": "Print the script that completes verbs and flags in bash, zsh or fish.",
    "studio": "A local page: move scales, guidance, seed and prompt, and see base and corrected model side by side.",
    "demo": "Each verb once on small models, and the page that leads to what they made.",
}
