"""How `fuse_fbn` and `convert_fbn` work.

`watch` runs a copy of the network to find what may be rewritten, and `plan` records it. `folding` or `conversion`
rewrites another copy, and `proof` runs this copy to prove that the outputs stay the same. Only then does the network
itself change.
"""
