"""`python -m flexdma view`: one HTML page in which a person sees what each query keeps of a text.

record      models and text -> the numbers of the page
page        numbers -> the page, one file that needs no network
page.html, page.css, page.js    its parts
command     the command line
"""
