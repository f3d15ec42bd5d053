"""What dev.py, the demo and the tests share; standard library only."""
