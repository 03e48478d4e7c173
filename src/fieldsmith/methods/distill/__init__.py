"""distill: a smaller student of a guided teacher that keeps both branches (DASH, arXiv 2606.00798) and so its guidance.

In: a teacher with a null class, data, a DistillConfig. Out: a trained student Model. The algebra of objectives
(objectives.py), their losses, weights over time (curriculum.py) and the cached teacher (bank.py) stand on their own.
"""
