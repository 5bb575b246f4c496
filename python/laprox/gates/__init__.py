"""Retention gates: small networks that tell, when a token is created, how long each KV head should keep it.

DBTrimKV (arXiv 2605.09649) and TRIM-KV (arXiv 2512.03324). The engine runs them; here they are made: converted from the
authors' files (`convert`), or trained (`training`, which alone needs PyTorch). docs/retention-gates.md is the guide.
"""
