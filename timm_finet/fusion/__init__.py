"""How `fuse_fbn` and `convert_fbn` work.

A copy of the network runs under a `watch`, which tells what may be rewritten: the `plan`. Another copy is rewritten by
`folding` or `conversion` and runs too, which is the `proof` that the outputs stay; only then the network changes.
"""
