//! The dropout of adapters. libtorch's generator is one for all threads of a process, so that what follows from its seed is one
//! test.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{
    adapters::{adapted, lora, networks, stirred, unet},
    equal, relative_error,
};
use potstill_models::{Denoiser, Lora, Mode};
use tch::{Kind, Tensor, no_grad};

#[test]
fn masks_follow_from_the_seed_have_the_branch_as_their_mean_and_are_drawn_again() {
    dropout_of_adapters_is_for_training_alone_and_follows_from_the_seed();
    the_mean_over_masks_is_the_branch_without_dropout();
    recomputed_blocks_draw_the_same_masks();
}

/// Adapters that see half of their inputs while they train.
fn halved(lora: Lora) -> Lora {
    Lora { dropout: 0.5, ..lora }
}

fn dropout_of_adapters_is_for_training_alone_and_follows_from_the_seed() {
    for (network, x, time, condition) in networks() {
        let targets = lora(2, Some(&["conv1"]));
        let values = stirred(adapted(network.as_ref(), &targets)).parameters().flat().copy();
        let [plain, dropping] = [targets.clone(), halved(targets)]
            .map(|lora| adapted(network.as_ref(), &lora).over(values.copy(), false));
        let passed = |network: &dyn Denoiser, mode| {
            tch::manual_seed(7);
            no_grad(|| network.denoise(&x, &time, &condition, mode))
        };
        let [without, with] = [&plain, &dropping].map(|n| passed(n.as_ref(), Mode::Eval));
        assert!(equal(&without, &with), "no dropout outside of training");
        let first = passed(dropping.as_ref(), Mode::TrainAdapters);
        assert!(
            equal(&without, &passed(plain.as_ref(), Mode::TrainAdapters)),
            "the network's own is another"
        );
        assert!(!equal(&first, &without));
        assert!(equal(&first, &passed(dropping.as_ref(), Mode::TrainAdapters)), "the seed decides");
        let again = no_grad(|| dropping.denoise(&x, &time, &condition, Mode::TrainAdapters));
        assert!(!equal(&first, &again), "another pass, other masks");
    }
    let (_, x, time, condition) = networks().remove(1);
    let network = stirred(adapted(&unet(), &lora(2, None)));
    let [train, eval] =
        [Mode::Train, Mode::Eval].map(|m| no_grad(|| network.denoise(&x, &time, &condition, m)));
    assert!(equal(&train, &eval), "without dropout training changes nothing");
}

/// The output is linear in the adapter of the last layer, so there the mean over masks is the branch without dropout.
fn the_mean_over_masks_is_the_branch_without_dropout() {
    let (network, x, time, condition) = networks().remove(1);
    let last = lora(2, Some(&["conv_out"]));
    let values = stirred(adapted(network.as_ref(), &last)).parameters().flat() * 3.0;
    let dropping = adapted(network.as_ref(), &halved(last)).over(values, false);
    let passed = |network: &dyn Denoiser, mode| no_grad(|| network.denoise(&x, &time, &condition, mode));
    let without = passed(dropping.as_ref(), Mode::Eval);
    let branch = &without - passed(network.as_ref(), Mode::Eval);
    let sum = |passes: i32| {
        let one = || passed(dropping.as_ref(), Mode::Train) - &without;
        (1..passes).fold(one(), |sum, _| sum + one()) / f64::from(passes)
    };
    let size = |x: &Tensor| x.square().sum(Kind::Float).double_value(&[]).sqrt();
    let (one, many) = (size(&sum(1)) / size(&branch), size(&sum(400)) / size(&branch));
    assert!(one > 0.2, "a mask changes the branch: {one}");
    assert!(many < one / 10.0, "{many} of {one}");
}

fn recomputed_blocks_draw_the_same_masks() {
    let (_, x, time, condition) = networks().remove(1);
    let weight = x.randn_like();
    let lora = halved(lora(2, None));
    let values = stirred(adapted(&unet(), &lora)).parameters().flat().copy();
    let gradients = [false, true].map(|again| {
        let with = adapted(&unet().with_recomputation(again), &lora).over(values.copy(), true);
        tch::manual_seed(9);
        // Two passes of one graph, as a generator of two steps has.
        let first = with.denoise(&x, &time, &condition, Mode::Train);
        let second = with.denoise(&first, &time, &condition, Mode::Train);
        (second * &weight).sum(Kind::Float).backward();
        let named = with.parameters().entries().iter().zip(with.parameters().leaves());
        named.map(|(entry, leaf)| (entry.name.clone(), leaf.grad())).collect::<Vec<_>>()
    });
    // Up to the order of sums: with other masks they would differ by their size.
    let errors = gradients[0].iter().zip(&gradients[1]);
    let errors = errors.map(|(kept, again)| (&kept.0, relative_error(&again.1, &kept.1)));
    let differ: Vec<_> = errors.filter(|(_, error)| *error > 1e-4).collect();
    assert!(differ.is_empty(), "{differ:?}");
}
