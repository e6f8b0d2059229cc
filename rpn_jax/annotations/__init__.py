"""Label maps as the annotations of other programs: COCO, labelme, YOLO, VOC, and files of scores.

Coordinates are those of a region's outline along the edges of its pixels: (0, 0) is the upper left
corner of the image and (width, height) the lower right one. Pixels of no class (-1) are in no form.
"""
