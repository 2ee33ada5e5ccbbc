"""`grass-dist plan` tells whether a model fits, what a step costs, and which settings to use, before any GPU is taken.

Memory is computed by a closed form (`memory`) and by a simulation of the training step (`simulate`), time by a cost
model (`cost`) whose constants are in `speeds`. docs/plan.md says what is counted, and how near it is.
"""
