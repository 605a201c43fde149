"""`python -m flexdma view`: one HTML page that shows the keys of a text that each query keeps.

record      models and text -> the numbers of the page
page        numbers -> the page, one file that needs no network
page.html, page.css, page.js    its parts
command     the command line
"""
