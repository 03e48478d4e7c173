"""`edit`: editors that survive many turns (MT-EditFlow, arXiv 2606.01985), by GRPO or NFT, with its controls.

In: an editing model, sessions, a judge of following and consistency. Out: an adapter, trained on the model's own
sessions. config.py settings and recipes (no torch), credit.py who gets which advantage, rollouts.py sessions turn by
turn, loop.py the run.
"""
