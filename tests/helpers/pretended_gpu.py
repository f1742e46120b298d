"""pytest in a process where torch says that there is a GPU."""

PROGRAM = "import sys, pytest, torch; torch.cuda.is_available = lambda: True; sys.exit(pytest.main(sys.argv[1:]))"
