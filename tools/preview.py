"""Preview the site without Quarto: nbdev's processed notebooks (`nbdev-proc-nbs` writes _proc/),
rendered by smalldocs.

    scripts/pages.sh                                               # the site is in _preview/_docs

Quarto turns formulas into MathML by itself (`html-math-method: mathml`) and drops the number from
page names. smalldocs does neither, so this script does both on the way from _proc/ to _preview/.
Links to the published site stay in the preview. """
import json
import re
import shutil
from pathlib import Path

from latex2mathml.converter import convert

root = Path(__file__).resolve().parents[1]
src, dst = root/'_proc', root/'_preview'


def page_name(name): return re.sub(r'^\d+[a-z]*_', '', name)


def maths(text):
    "`$…$` and `$$…$$` outside of code become MathML"
    parts = re.split(r'(```.*?```|`[^`\n]+`)', text, flags=re.S)   # code keeps its dollars
    for i in range(0, len(parts), 2):
        part = re.sub(r'\$\$(.+?)\$\$', lambda m: f'\n{convert(m[1].strip(), display="block")}\n',
                      parts[i], flags=re.S)
        parts[i] = re.sub(r'(?<![\\$])\$(\S(?:[^$]*?\S)?)\$(?!\d)', lambda m: convert(m[1]), part)
    return ''.join(parts)


def main():
    shutil.rmtree(dst, ignore_errors=True)
    dst.mkdir()
    config = (src/'_quarto.yml').read_text(encoding='utf-8')
    site = re.search(r'site-url: *["\']?([^"\'\s]+)',
                     (src/'nbdev.yml').read_text(encoding='utf-8'))[1].rstrip('/') + '/'
    pages = [f.relative_to(src) for f in src.rglob('*.ipynb')]
    names = {page.as_posix(): page.with_name(page_name(page.name)).as_posix() for page in pages}
    for old, new in names.items():
        up = '../'*new.count('/')
        nb = json.loads((src/old).read_text(encoding='utf-8').replace(site, up))
        for cell in nb['cells']:
            if cell['cell_type'] != 'markdown': continue
            text = maths(''.join(cell['source']))
            # smalldocs makes these .html, as Quarto does
            text = re.sub(r'(\]\((?:[\w.-]+/)*)([\w]+\.ipynb)',
                          lambda m: m[1] + page_name(m[2]), text)
            cell['source'] = text
        config = config.replace(old, new)
        (dst/new).parent.mkdir(exist_ok=True)
        (dst/new).write_text(json.dumps(nb), encoding='utf-8')
    (dst/'_quarto.yml').write_text(config, encoding='utf-8')
    shutil.copy(src/'styles.css', dst)


if __name__ == '__main__': main()
