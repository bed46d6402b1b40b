# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which method should I believe?
#
# **Question.** Ablations, probes, attention maps and alignment search all say where a mechanism is.
# Which of them are right where the answer is known?
#
# **Answer.** In hand-written transformers every head's job and every value's place are known from
# the program. Three popular methods are confidently wrong there. Zero ablation says that a head
# does nothing, because a backup steps in (left). A linear probe finds a value perfectly that
# nobody reads (middle). Alignment search learns a subspace that acts just like a copy of a value
# that has no effect at all (right). In each case a cheaper intervention is right.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

from probes.bench.evidence import Evidence
from probes.bench.methods import METHODS
from probes.bench.subjects import make_subject

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
jax.config.update("jax_enable_x64", True)
BATCH = 256


def ask(evidence, method, task):
    """The answer of a method, and what it cost."""
    found = METHODS[method](evidence.subject, task, evidence)
    print(f"{method}: {found.runs:g} runs of the model")
    return found


# %% [markdown]
# ## A head that nothing seems to need
#
# Two steps of gradient descent. In the first layer the head's job is done twice: "first" writes,
# and a backup writes into a slot that an MLP passes on only where the first is silent. Setting the
# head's output to zero makes it silent, so that the backup steps in and the prediction stays. To
# give the head what it would have written on another input does not, and costs the same.

# %%
backed = Evidence(make_subject("gradient-descent", "backup", 0, BATCH))
zero = ask(backed, "zero ablation", "heads")
resampled = ask(backed, "resample ablation", "heads")
roles = backed.subject.roles
for at in zip(*np.nonzero(roles != "unused"), strict=True):
    effects = f"zero {zero.scores[at]:.2f}, another input's {resampled.scores[at]:.2f}"
    print(f"layer {at[0] + 1}, {roles[at]} head: {effects}")
hidden = (roles == "used") & (zero.scores < 1e-9)
assert hidden.sum() == 1 and resampled.scores[hidden].min() > 0.1

# %% [markdown]
# The backup itself moves nothing under either: on these inputs it is without effect, and only
# removing both heads shows that it has a job.
#
# ## A value that can be read, and is not
#
# The same model with distractors: a copy of the inputs, noise, and heads that write where nobody
# reads. The probe is asked for each value after each layer, with a control task. Its score is near
# 1 for all of them. Exchanging what it reads with another input's value shows which are used.

# %%
planted = Evidence(make_subject("gradient-descent", "distractors", 0, BATCH))
probe = ask(planted, "linear probe", "sites")
exchanged = ask(planted, "true subspace", "sites")
patched = ask(planted, "patched probe", "sites")
used = np.array([site.used for site in planted.subject.sites])
unread = [n for n, site in enumerate(planted.subject.sites) if not site.used]
print(f"{len(unread)} values that nobody uses: probe R² {probe.scores[unread].mean():.2f}")
print(f"largest effect of exchanging one of them: {exchanged.scores[unread].max():.1e}")
assert probe.scores[unread].mean() > 0.9 and exchanged.scores[unread].max() < 1e-9

# %% [markdown]
# ## A subspace that acts like a value it has nothing to do with
#
# Alignment search learns the directions whose exchange moves the prediction as the hypothesis says.
# The hypothesis here: the copy of the inputs, which nobody reads, is what the model computes with.
# The search finds directions in the same tokens that do it, namely those of the original, and its
# accuracy says that the hypothesis holds. Their angle to the copy's own columns says otherwise; so
# does exchanging what a probe for the copy reads, which needs no search.

# %%
search = ask(planted, "alignment search", "sites")
copies = [n for n, s in enumerate(planted.subject.sites) if s.slot == "copy" and s.layer == 0]
for n in copies:
    own = planted.subject.sites[n].basis
    basis = search.bases[n]
    angle = np.degrees(np.arccos(np.sqrt(np.sum((basis.T @ own) ** 2) / own.shape[1])))
    site = planted.subject.sites[n]
    print(f"{site.name}: accuracy {search.scores[n]:.2f} at {angle:.0f}° to the copy")
best = max(copies, key=lambda n: search.scores[n])
assert search.scores[best] > 0.8 and exchanged.scores[best] < 1e-9

# %% [markdown]
# ## The three cases in one figure

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
shown = np.argwhere(roles != "unused")
labels = [f"layer {layer + 1}\n{roles[layer, head]}" for layer, head in shown]
place = np.arange(len(shown))
axes[0].bar(place - 0.2, [zero.scores[tuple(at)] for at in shown], 0.4, color=ORANGE)
axes[0].bar(place + 0.2, [resampled.scores[tuple(at)] for at in shown], 0.4, color=BLUE)
axes[0].set_xticks(place, labels)
axes[0].legend(["zero ablation", "resample ablation"], frameon=False, loc="upper center")
axes[0].set(
    ylim=(0, 0.7),
    ylabel="change of the prediction / distance of two inputs",
    title="heads with a job",
)
for chosen, colour, name in ((used, BLUE, "used"), (~used, ORANGE, "used by nobody")):
    axes[1].plot(probe.scores[chosen], exchanged.scores[chosen], "o", color=colour, label=name)
axes[1].set(xlabel="R² of the probe", ylabel="effect of exchanging the value", title="values")
axes[1].legend(frameon=False)
bars = [search.scores[best], patched.scores[best], exchanged.scores[best]]
axes[2].bar(range(3), bars, color=[ORANGE, BLUE, GREY])
axes[2].set_xticks(
    range(3), ["alignment search\n(accuracy)", "probe,\nexchanged", "copy,\nexchanged"]
)
axes[2].set(ylabel="score", title="a copy that nobody reads")
plt.show()
