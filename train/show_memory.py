"""Write an HTML page that shows the tokens each layer holds during a stream, for two policies side by side.

python train/show_memory.py --config X.yaml --video FILE --policies A B --out memory.html
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("show-memory")
