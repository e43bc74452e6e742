"Package metadata. Every value comes from settings.ini: edit that file, not this one."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
lib = cfg['lib_path']
lessons = cfg['lessons_requirements'].split()

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    license={'apache2': 'Apache-2.0', 'mit': 'MIT'}[cfg['license']],
    keywords=cfg['keywords'],
    url=cfg['git_url'],
    # The lessons quote the benchmarks' tables, also where there is no clone.
    packages=[lib, f'{lib}.lib', f'{lib}.app', f'{lib}.benchmarks'],
    package_dir={f'{lib}.benchmarks': 'benchmarks'},
    package_data={lib: ['*.yaml', 'configs/*.yaml', 'configs/*/*.yaml',
                        'student/*'],
                  f'{lib}.benchmarks': ['*.json', '*.md']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'lessons': lessons,
                    'dev': lessons + cfg['dev_requirements'].split(),
                    'teacher': cfg['teacher_requirements'].split()},
    entry_points={'nbdev': [f'{lib}={lib}._modidx:d'],
                  'console_scripts': cfg.get('console_scripts', '').split()},
)
