"""The papers' claims at laptop scale: one file a verb, resumable run by run, results committed under results/.

In: zoo models. Out: results/VERB/summary.json with claims, the runs behind them, plots and a README made from both.
"""
