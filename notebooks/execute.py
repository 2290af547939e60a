"""Runs notebooks and stores them with their outputs: ``python notebooks/execute.py NAME``; all without a name."""

import os
import pathlib
import sys

import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent


def execute(path):
    """Each in a kernel of its own, which finds this checkout; without times, versions and warnings in the file."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=600, record_timing=False).execute()
    notebook.metadata = metadata  # The kernel adds its version.
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    nbformat.write(notebook, path)


def joined(outputs):
    """One text a cell, in place of one for each time that it was sent."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(names):
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    for path in [HERE / f"{name}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb")):
        print(path.stem, flush=True)
        execute(path)


if __name__ == "__main__":
    main(sys.argv[1:])
