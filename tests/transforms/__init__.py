"""The package under torch's transforms and autograd machinery, beside torch: cases.py holds what the tests share."""
