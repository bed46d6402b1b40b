"""What is known of tasks in closed form.

one_layer         optima, population losses and plateaus of one layer of linear attention
spectral          gradient descent and GD++ as filters on the eigenvalues of each context
optimal_descent   their best step sizes and curvatures
experts           prediction with expert advice: Hedge, and experts that sleep
ridge             ridge regression, with and without knowledge of the noise
"""
