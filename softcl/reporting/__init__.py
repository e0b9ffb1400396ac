"""The parts of the report.

runs         what runs wrote, and scores of them (scores)
figures      numbers over time
samples      features of some images, of a run or of a file, and the images
pictures     what is made of those: views, neighbors, maps, attention, in rows of tiles
page         one HTML file of all that, in the colours of theme
"""
