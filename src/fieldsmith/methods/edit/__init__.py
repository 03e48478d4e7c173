"""`edit`: editors that survive many turns (MT-EditFlow, arXiv 2606.01985), by GRPO or NFT, with its controls.

In: an editing model, sessions, a judge of following and consistency. Out: an adapter, trained on the model's own
sessions. config.py settings and presets (no torch), rollouts.py sessions turn by turn, credit.py which turn gets which
advantage, batch.py what an update learns from, step.py losses and preflight, measure.py and report.py what changed.
"""
