"""Write pyproject.toml (and the version in seismodel/__init__.py) from settings.ini: `python
tools/settings.py`.

nbdev's own converter lists only the top package, and no data; sub-packages and the models of the
box would be missing from a wheel, so these lines are set here. So is the line that says how pages
show signatures, which the converter leaves out. """
from pathlib import Path

from nbdev.migrate import nbdev_migrate_config


INCLUDE = """\
include = ["seismodel*"]
exclude = ["seismodel.box*"]

[tool.setuptools.package-data]
seismodel = ["box/*/*"]"""      # folders of files, not of modules
RENDERER = """\
[tool.nbdev]
renderer = 'signatures.SignatureRenderer'"""   # tools/signatures.py


def write_pyproject(
    root: Path,  # the folder that holds settings.ini
):
    """pyproject.toml as nbdev makes it, with every sub-package and the box in the wheel, and the
    renderer of signatures; raises `ValueError` where nbdev writes another line"""
    nbdev_migrate_config.__wrapped__(str(root))
    path = Path(root)/'pyproject.toml'
    text = path.read_text(encoding='utf-8')
    for line, more in (('include = ["seismodel"]', INCLUDE), ('[tool.nbdev]', RENDERER)):
        if line not in text:
            raise ValueError(f"nbdev wrote no line '{line}' into {path}; "
                             'look at what it writes now.')
        text = text.replace(line, more)
    path.write_text(text, encoding='utf-8')


if __name__ == '__main__': write_pyproject(Path(__file__).resolve().parents[1])
