"""Decode with a run: python generate.py --run checkpoints/quickstart --prompt "def main():" """

from specstream.cli import generate

if __name__ == "__main__":
    raise SystemExit(generate())
