"""Why skip connections work: seven claims of the papers, run on the package's own blocks.

    python -m bench.studies [NAME ...] [--preset quick|full] [--data digits|cifar10|FOLDER]

A study is a file: what it runs, its plot and its three sentences. ``study.py`` says what a study is, ``networks.py`` has the networks,
``drawing.py`` the style, ``registry.py`` the names, ``running.py`` runs them; data and training loop are :mod:`bench.data` and
:mod:`bench.training`.
"""
