"""The attacks of ``bench reliability``: one file a kind, what they share in cases.py."""
