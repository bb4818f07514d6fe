"""A CLI whose --optimizer excludes norms and biases from adaptation, under every strategy.

python examples/large_batch_cli.py fit --config examples/large_batch_cli.yaml
"""

from classifiers import Classifier
from images import Digits

from lightning_lars.cli import LargeBatchCLI

if __name__ == "__main__":
    LargeBatchCLI(Classifier, Digits)
