"""Composition of skills (Yu et al. 2023, arXiv 2310.17567; Arora and Goyal 2023, arXiv 2307.15936).

construction    the algorithm, its looped layer, the trained counterpart, rows
paper           what is stated of trained ones, as claims
"""

from constructions.catalogue import Family, lazily

SKILL_COMPOSITION = Family(
    name="skill-composition",
    construct="constructions.skills.construction:SkillComposition",
    settings={"dim": 4, "skills": 8},
    about="one looped layer applies the skills that a task names, in order, in tuples never shown",
    source="Yu et al. 2023, arXiv 2310.17567; Arora and Goyal 2023, arXiv 2307.15936",
    measure="constructions.skills.construction:measure",
)

__getattr__ = lazily(
    __name__,
    SkillComposition="constructions.skills.construction",
)
