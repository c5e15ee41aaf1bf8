"""How alike representations are: CKA, CCA, and the features they compare."""
