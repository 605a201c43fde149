"""`python -m flexdma view`: one HTML page that shows the keys of a text that each query keeps.

demo_models     the byte models of the demo -> what the page draws
model_folder    the folder of a converted model of transformers, and the tokens of a text
converted       such a model -> what the page draws
attended        full attention, and what each query attends to most
labels          one readable label for each token
record          what the page draws -> its data
page            data -> the page, one file that needs no network
page.html, page.css, data.js, panel.js, page.js    its parts
command         the command line
"""
