"""Train a draft model or a target: python train.py --config configs/train/quickstart.yaml"""

from specstream.cli import train

if __name__ == "__main__":
    raise SystemExit(train())
